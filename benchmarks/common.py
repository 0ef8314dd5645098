"""What all benchmarks share: on which machine a report was made, and how long one call takes."""

import os
import platform
import time
from collections.abc import Callable

import torch
import transformers


def machine(device: str | torch.device) -> dict:
    """For the report: system, cores, threads, name of the device, versions."""
    cuda = torch.device(device).type == "cuda"
    return {
        "system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the device idle before and after."""
    wait = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
