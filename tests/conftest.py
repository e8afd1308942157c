"""What every test shares: the project on the path, a fixed number of threads, no network."""

import sys
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the network fails the same way on every machine; local files may still be 'fetched'."""
    real_open = urllib.request.urlopen

    def refuse(request, *args, **kwargs):
        url = request if isinstance(request, str) else request.full_url
        if not url.startswith("file:"):
            raise urllib.error.URLError("no network in tests")
        return real_open(request, *args, **kwargs)

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
