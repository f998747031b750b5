"""What holds for all tests."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _measurements_of_their_own(tmp_path_factory):
    """Layouts that tests measure are kept apart from the user's (`tcompress.tune`), in processes they start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TCOMPRESS_TUNE", raising=False)
        yield
