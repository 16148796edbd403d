"""Prefect's clients share one TLS context, which is what it would have been."""

import ssl

import pytest
from prefect.client import orchestration
from prefect.client.orchestration import SyncPrefectClient

from infra.orchestration.tls import share_tls_context


@pytest.fixture
def contexts(monkeypatch):
    """All that are made from now on."""
    made, make = [], ssl.create_default_context

    def counted(*arguments, **keywords):
        made.append(make(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", counted)
    monkeypatch.setattr(orchestration, "ssl", ssl)  # as Prefect has it
    return made


def client():
    return SyncPrefectClient("http://127.0.0.1:9/api")


def test_prefect_makes_one_a_client(contexts):
    client(), client()
    assert (
        len(contexts) >= 2
    )  # else there is nothing to share any more: remove infra/orchestration/tls.py


def test_clients_share_one(contexts):
    share_tls_context()
    share_tls_context()
    client(), client()
    (context,) = contexts
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
