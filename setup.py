"""Runs CMake for pip, nothing else: CMakeLists.txt describes the build, pyproject.toml the package."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # GINGHAM_BUILD: one folder for several interpreters, whose objects of the core are the same (wheels.py)
        folder = Path(os.environ.get("GINGHAM_BUILD", ROOT / "build" / f"pip-{sys.implementation.cache_tag}"))
        options = {
            "GINGHAM_OUTPUT": output,
            "GINGHAM_VERSION": VERSION,
            "GINGHAM_BINDING": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "WITH_CUDA": os.environ.get("WITH_CUDA", "AUTO"),
            "GINGHAM_WERROR": os.environ.get("GINGHAM_WERROR", "OFF"),
            # an isolated build environment has a new path every time, and the cache would keep the old one's
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        subprocess.run(configure + [f"-D{name}={value}" for name, value in options.items()], check=True)
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs], check=True)
        if self.editable_mode:  # setuptools copies only the extension beside the sources
            shutil.copytree(output / "bin", ROOT / "python" / "gingham" / "bin", dirs_exist_ok=True)


setup(ext_modules=[Extension("gingham._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
