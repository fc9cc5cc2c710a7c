"""Routes, policies and routers: who decides which branch a token takes."""
