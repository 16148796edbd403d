"""Folders on S3: a real endpoint over HTTP, and what goes wrong on the way."""

import hashlib
import os
import re
import time

import boto3
import pytest
import s3fs

from infra import remote
from infra.remote import RemoteError, download, listing, upload

CONTENT = {"config.json": b"{}", "empty": b"", "deep/model.safetensors": os.urandom(300_000)}


@pytest.fixture
def bucket(s3, tmp_path_factory):
    name = f"b{time.time_ns()}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def source(tmp_path):
    for name, content in CONTENT.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "source"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 50_000)


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [500, 503, 500],
        ["close", "close"],
        [503, "close", 500, "close", 503, "close"],
    ],
    ids=str,
)
def test_there_and_back(s3, bucket, source, tmp_path, small_blocks, faults):
    s3.faults.extend(faults)
    upload(source, f"{bucket}/model", CONTENT)
    s3.faults.extend(faults)
    found = listing(f"{bucket}/model/")
    assert found.keys() == CONTENT.keys()
    s3.faults.extend(faults)
    download(f"{bucket}/model", found, tmp_path / "copy")
    assert read(tmp_path / "copy") == CONTENT
    assert not s3.faults


def test_an_endpoint_that_is_down_for_twenty_seconds(s3, bucket, source, tmp_path, small_blocks):
    upload(source, bucket, CONTENT)
    start = time.monotonic()
    s3.down(20)
    download(bucket, CONTENT, tmp_path / "copy")
    assert time.monotonic() - start >= 20
    assert read(tmp_path / "copy") == CONTENT


def test_what_is_there_is_not_sent_again(s3, bucket, source):
    upload(source, bucket, CONTENT)
    (source / "config.json").write_bytes(b"[]")
    s3.requests.clear()
    upload(source, bucket, CONTENT)
    assert [
        path.split("?")[0].split("/", 2)[2] for method, path, _ in s3.requests if method == "PUT"
    ] == ["config.json"]


def test_a_download_goes_on_where_it_was_left(
    s3, bucket, source, tmp_path, small_blocks, monkeypatch
):
    upload(source, bucket, CONTENT)
    blocks = []

    def fail_late(filesystem, address, start, end):
        if len(blocks) == 4:
            raise KeyboardInterrupt
        blocks.append(start)
        return read_block(filesystem, address, start, end)

    read_block = remote._block
    monkeypatch.setattr(remote, "_block", fail_late)
    with pytest.raises(KeyboardInterrupt):
        download(bucket, CONTENT, tmp_path / "copy")
    assert not (tmp_path / "copy/deep/model.safetensors").exists()
    kept = list(blocks)
    blocks.clear()
    blocks += [None] * 5  # never again
    download(bucket, CONTENT, tmp_path / "copy")
    assert read(tmp_path / "copy") == CONTENT
    assert not set(kept) & set(blocks[5:])


@pytest.mark.parametrize("granted", [0, 2, 5], ids="{} requests".format)
def test_credentials_revoked_on_the_way(s3, bucket, source, tmp_path, small_blocks, granted):
    """An error at once that says what is needed; given back, it goes on where it was."""
    name = "deep/model.safetensors"
    denied = [*[None] * granted, *[403] * 20]
    for transfer, to in ((upload, f"{bucket}/new"), (download, tmp_path / "copy")):
        arguments = (source, to, [name]) if transfer is upload else (f"{bucket}/new", [name], to)
        if transfer is download or granted < 2:  # a small file is there after two requests
            s3.faults.extend(denied)
            with pytest.raises(RemoteError, match=rf"{name}: no permission .*AWS_ACCESS_KEY_ID"):
                transfer(*arguments)
            assert len(s3.faults) > 10  # it was not asked again and again
            s3.faults.clear()
            assert not (tmp_path / "copy" / name).exists()
        transfer(*arguments)
    assert read(tmp_path / "copy") == {name: CONTENT[name]}


def test_content_that_is_not_what_was_uploaded(s3, bucket, source, tmp_path):
    upload(source, bucket, CONTENT)
    sha256 = hashlib.sha256(CONTENT["config.json"]).hexdigest()
    (source / "config.json").write_bytes(b"[]")
    address = f"{bucket}/config.json".removeprefix("s3://")
    s3fs.S3FileSystem().put_file(str(source / "config.json"), address, Metadata={"sha256": sha256})
    with pytest.raises(
        RemoteError, match=f"config.json: content differs from its SHA-256, {sha256}"
    ):
        download(bucket, ["config.json"], tmp_path / "copy")
    assert read(tmp_path / "copy") == {}


def test_an_object_that_others_put_there(s3, bucket, source, tmp_path):
    s3fs.S3FileSystem().put_file(
        str(source / "config.json"), f"{bucket}/config.json".removeprefix("s3://")
    )
    download(bucket, listing(bucket), tmp_path / "copy")
    assert read(tmp_path / "copy") == {"config.json": b"{}"}


@pytest.mark.parametrize(
    "key", ["../../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "a//x", "./x"]
)
def test_nothing_is_written_outside_of_the_folder(s3, bucket, source, tmp_path, key):
    upload(source, bucket, ["config.json"])
    before = read(tmp_path)
    with pytest.raises(RemoteError, match=re.escape(f"the key {key!r} is no file's name")):
        download(bucket, ["config.json", key], tmp_path / "deep" / "copy")
    assert read(tmp_path) == before


def test_a_bucket_whose_keys_climb(s3, bucket, source, tmp_path):
    """As a listing gives them, of whoever may write there."""
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    name = bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="model/../../x.safetensors", Body=b"evil")
    with pytest.raises(RemoteError, match="is no file's name in a folder"):
        download(f"{bucket}/model", listing(f"{bucket}/model"), tmp_path / "deep" / "copy")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("missing", ["nothing-here", "no-such-bucket"])
def test_nothing_there(s3, bucket, missing):
    url = f"{bucket}/{missing}" if missing == "nothing-here" else f"s3://{missing}"
    with pytest.raises(RemoteError, match=f"{url}: (nothing is there|not found)"):
        listing(url)


def test_patience_ends_with_the_last_error(s3, bucket, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE_S", 1)
    s3.faults.extend([503] * 100)
    with pytest.raises(RemoteError, match=f"{bucket}: no answer for 1 s"):
        listing(bucket)
    s3.faults.clear()
