"""Statements: their subject, their signature, what moved."""

import base64
import json
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from dpq_core.attestation.envelope import opened, private_key, signed
from dpq_core.attestation.statement import (
    FILE,
    StatementError,
    moved,
    read_statement,
    statement,
    subject_of_folder,
)
from dpq_core.checkpoint.native import FORMAT_VERSION, MANIFEST
from dpq_core.digests import file_digest, write_json

SAID = statement({"model.safetensors": "0" * 64}, {"verdict": "passed"})


def written(folder, key, name):
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def keys(tmp_path):
    return written(tmp_path, ed25519.Ed25519PrivateKey.generate(), "own")


def test_a_statement_is_of_every_file_but_the_card_and_itself(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md", FILE, ".hidden"):
        (tmp_path / name).write_text(name)
    found = subject_of_folder(tmp_path)
    names = ["config.json", "model.safetensors"]
    assert found == {name: file_digest(tmp_path / name) for name in names}
    said = statement(found, {})
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert [each["name"] for each in said["subject"]] == names


def test_a_statement_of_a_checkpoint_is_of_what_its_manifest_lists(tmp_path):
    """The rest is put beside it later, or by who loads it."""
    for name in ("model.safetensors", "MLmodel"):
        (tmp_path / name).write_text(name)
    about = {"format_version": FORMAT_VERSION, "scheme": {}, "layers": []}
    write_json(tmp_path / MANIFEST, {**about, "files": {"model.safetensors": {}}})
    names = [MANIFEST, "model.safetensors"]
    assert subject_of_folder(tmp_path) == {name: file_digest(tmp_path / name) for name in names}


def test_a_signature_is_of_dsse(keys, tmp_path):
    """Checked by OpenSSL, over the bytes that the protocol says."""
    private, public = keys
    envelope = signed(SAID, private_key(private))
    body = base64.b64decode(envelope["payload"])
    assert json.loads(body) == SAID
    kind = b"application/vnd.in-toto+json"
    (tmp_path / "pae").write_bytes(b"DSSEv1 28 %b %d %b" % (kind, len(body), body))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    command += ["-in", str(tmp_path / "pae"), "-sigfile", str(tmp_path / "sig")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert opened(envelope, public) == SAID


def test_what_was_changed_or_signed_by_others_is_refused(keys, tmp_path):
    envelope = signed(SAID, private_key(keys[0]))
    _, other = written(tmp_path, ed25519.Ed25519PrivateKey.generate(), "other")
    with pytest.raises(StatementError, match="not signed by the key"):
        opened(envelope, other)
    refused = {**SAID, "predicate": {"verdict": "refused"}}
    changed = base64.b64encode(json.dumps(refused).encode()).decode()
    with pytest.raises(StatementError, match="was changed"):
        opened({**envelope, "payload": changed}, keys[1])


def test_other_keys_are_refused(tmp_path):
    private, public = written(tmp_path, rsa.generate_private_key(65537, 2048), "rsa")
    with pytest.raises(StatementError, match="is no Ed25519 key: make one with openssl"):
        private_key(private)
    with pytest.raises(StatementError, match="cannot be read"):
        private_key(tmp_path / "missing.pem")
    with pytest.raises(StatementError, match="is no Ed25519 key"):
        opened({"payload": "", "signatures": []}, public)


def test_statements_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(StatementError, match="run dpq attest without --again first"):
        read_statement(tmp_path / FILE)
    write_json(tmp_path / FILE, SAID | {"predicateType": "urn:dpq:engine-attestation:2"})
    with pytest.raises(StatementError, match="engine-attestation:2 is no statement"):
        read_statement(tmp_path / FILE)


def test_what_moved():
    before = {"verdict": "passed", "engine": {"version": "1", "kernels": ["A"]}, "made": "then"}
    after = {"verdict": "refused", "engine": {"version": "1", "kernels": ["B"]}, "made": "now"}
    assert moved(before, after) == {
        "verdict": ("passed", "refused"),
        "engine.kernels": (["A"], ["B"]),
    }
    assert moved(before, before) == {}
