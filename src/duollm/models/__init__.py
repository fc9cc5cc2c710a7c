"""The duo model: configuration, modelling code, conversion."""
