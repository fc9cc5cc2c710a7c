import pytest

import tiny_corpus
from duollm.config import DataConfig
from duollm.data.packing import prepare_data


@pytest.fixture
def write_corpus():
    return tiny_corpus.write_corpus


@pytest.fixture
def corpus(tmp_path):
    return tiny_corpus.write_corpus(tmp_path / "owls")


@pytest.fixture
def config(corpus):
    return DataConfig(domains=[str(corpus)], vocab_size=300, sequence_length=16, test_share=0.3)


@pytest.fixture
def packed(config, tmp_path):
    return prepare_data(config, seed=0, folder=tmp_path / "data")
