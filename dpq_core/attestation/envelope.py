"""A statement signed by an Ed25519 key: a DSSE envelope (secure-systems-lab/dsse, protocol 1.0).

    {"payloadType": "application/vnd.in-toto+json", "payload": base64(statement),
     "signatures": [{"keyid": SHA-256 of the public key, "sig": base64(signature)}]}

What is signed is PAE = "DSSEv1" len(type) type len(payload) payload, joined by single spaces, with
lengths in decimal. `sigstore` (keys of an identity, a public log) is left out: it needs a network.
"""

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from dpq_core.attestation.statement import StatementError
from dpq_core.errors import one_line

PAYLOAD = "application/vnd.in-toto+json"
_MAKE = "make one with openssl genpkey -algorithm ed25519"


def private_key(path: Path) -> Ed25519PrivateKey:
    """A key from a PEM file without a password.

    Raises:
        StatementError: no such file, or another kind of key.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise StatementError(f"the key {path} cannot be read: {one_line(error, 200)}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise StatementError(f"the key {path} is no Ed25519 key: {_MAKE}")
    return key


def signed(content: dict[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """The envelope of a statement."""
    body = json.dumps(content, sort_keys=True).encode()
    signature = key.sign(_pae(body))
    names = {"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}
    payload = base64.b64encode(body).decode()
    return {"payloadType": PAYLOAD, "payload": payload, "signatures": [names]}


def opened(envelope: dict[str, Any], path: Path) -> dict[str, Any]:
    """The statement in an envelope that the owner of a public key (a PEM file) has signed.

    Raises:
        StatementError: no envelope, or none that this key has signed.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
        body = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(each["sig"]) for each in envelope["signatures"]]
    except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
        raise StatementError(f"the envelope or the key {path}: {one_line(error, 200)}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise StatementError(f"the key {path} is no Ed25519 key: {_MAKE}")
    if envelope.get("payloadType") != PAYLOAD or not any(_by(key, s, body) for s in signatures):
        raise StatementError(f"the envelope was changed, or not signed by the key {path}")
    content: dict[str, Any] = json.loads(body)
    return content


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of a public key in DER."""
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _by(key: Ed25519PublicKey, signature: bytes, body: bytes) -> bool:
    try:
        key.verify(signature, _pae(body))
    except InvalidSignature:
        return False
    return True


def _pae(body: bytes) -> bytes:
    return b" ".join([b"DSSEv1", b"%d" % len(PAYLOAD), PAYLOAD.encode(), b"%d" % len(body), body])
