"""The browser of each file of tests."""

import shutil

import pytest
from browser import Browser


@pytest.fixture(scope="module")
def browser():
    found = Browser(shutil.which("chromium"))
    yield found
    found.close()
