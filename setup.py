"""What pyproject.toml cannot say: the folder recipes/ is installed as hft/recipes."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["hft*"]), "hft.recipes"], package_dir={"hft.recipes": "recipes"})
