import pytest

from duollm.config import DataConfig
from duollm.data.packed import PackedData
from duollm.data.packing import prepare_data
from tiny_corpus import write_corpus


def pack(folder, domains):
    """Windows of 8 tokens of some domains."""
    texts = [str(write_corpus(folder / name, documents=36, seed=seed)) for seed, name in enumerate(domains)]
    config = DataConfig(domains=texts, vocab_size=280, sequence_length=8, test_share=0.4)
    prepare_data(config, 0, folder / "data", progress=lambda line: None)
    return PackedData.open(folder / "data")


@pytest.fixture(params=[False, True], ids=["small vocabulary", "large vocabulary"])
def closer_bound(request, monkeypatch):
    """With and without the closer bound of a large vocabulary."""
    if request.param:
        monkeypatch.setattr("duollm.oracle.trial.LARGE", 1)
        monkeypatch.setattr("duollm.oracle.head._WORDS", 60)  # of the tiny models' 97
    return request.param


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Two domains; read only."""
    return pack(tmp_path_factory.mktemp("packed"), ["owls", "cats"])


@pytest.fixture(scope="session")
def owls(tmp_path_factory):
    """One domain, to be quick; read only."""
    return pack(tmp_path_factory.mktemp("owls"), ["owls"])
