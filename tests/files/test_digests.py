import hashlib

import pytest

from mola.files.digests import file_sha256


@pytest.mark.parametrize("size", [0, 3, 1 << 20, (1 << 20) + 1])
def test_sha256_is_that_of_all_bytes(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "data").write_bytes(content[:size])
    assert file_sha256(tmp_path / "data") == hashlib.sha256(content[:size]).hexdigest()
