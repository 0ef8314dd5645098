"""Kernels that begin with the heavy packages imported: torch, transformers and the like take 10 s in every notebook.

The fork server of the standard library imports them once, in a process of its own; every kernel is a fork of that, with
nothing in it but modules. Only on Linux without a GPU: a GPU's driver, once asked, does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jupyter_client import AsyncKernelManager

AVAILABLE = sys.platform == "linux" and not [*Path("/dev").glob("nvidia*"), *Path("/dev").glob("kfd")]
# Nothing that looks for its kernel when imported: pandas settles then how wide tables are, matplotlib where it draws.
LLAVA = ("llava.modeling_llava", "llava.processing_llava", "clip.modeling_clip", "llama.modeling_llama")
PRELOADED = [
    "ipykernel.kernelapp", "pyarrow.parquet", "scipy.stats", "torch", "transformers.models.auto.processing_auto",
    *(f"transformers.models.{name}" for name in LLAVA), "lvlm_utils.models", "lvlm_utils.prompts", "lvlm_utils.pruning",
    "lvlm_utils.attention",
]  # fmt: skip


class ForkedKernelManager(AsyncKernelManager):
    """What nbclient and papermill take as `kernel_manager_class`."""

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        process = context.Process(target=_kernel, args=(self.connection_file, dict(kw["env"]), kw.get("cwd")))
        process.start()
        self.provisioner.process, self.provisioner.pid = _Popen(process), process.pid

    _launch_kernel = _async_launch_kernel


class _Popen:
    """A fork, as jupyter_client handles the kernels that it starts itself."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _kernel(connection_file: str, environment: dict[str, str], folder: str | None) -> None:
    """Become a kernel, with the environment and the folder that it would have been started in."""
    from ipykernel.kernelapp import IPKernelApp

    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    parent = f"--IPKernelApp.parent_handle={os.getppid()}"  # the kernel ends when the fork server does
    IPKernelApp.launch_instance(argv=["--log-level=ERROR", parent, "-f", connection_file])
