"""Builds the native reader where that can be; without it the Python reader does its work. All else: pyproject.toml."""

import sys

from setuptools import Extension, setup

native = Extension("twoclocks._native", ["twoclocks/_native.c"], extra_compile_args=["-O2"], optional=True)
setup(ext_modules=[native] if sys.platform == "linux" else [])
