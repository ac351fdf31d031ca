import pytest
from helpers import write_dataset


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """A small data set by character, as the path that --dataset takes."""
    return write_dataset(tmp_path_factory.mktemp('dataset'))
