"""Builds the package; see pyproject.toml."""

from setuptools import setup

setup()
