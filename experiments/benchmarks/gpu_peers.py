"""PyTorch's training steps on a GPU, in processes of their own; the peers of `experiments.benchmarks.gpu`."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.gpu_timing import notice, seconds

MODES = ("eager", "compile")
PROGRAMS = ("pretraining", "fine-tuning")


class Peers:
    """A process per variant and program, which builds and compiles at once and measures when asked.

    Args:
      sizes: for each variant, how many images and their pixels along both sides.
    """

    def __init__(self, sizes: dict[str, tuple[int, int]]):
        self.sizes = sizes
        self.processes: list = []

    def __enter__(self) -> "Peers":
        context = multiprocessing.get_context("spawn")
        for variant, size in self.sizes.items():
            for program in PROGRAMS:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(variant, program, *size, theirs), daemon=True)
                process.start()
                theirs.close()
                self.processes.append((process, ours))
        return self

    def __exit__(self, *_) -> None:
        for process, connection in self.processes:
            connection.close()
            process.terminate()
            process.join()

    def wait(self) -> None:
        """Waits until every process has compiled its steps; forgets those that failed."""
        for process, connection in list(self.processes):
            try:
                connection.recv()
            except EOFError:
                notice("a PyTorch process ended early")
                self.processes.remove((process, connection))

    def measure(self, *, small: bool) -> list[dict]:
        """Returns a record per program and mode, after `wait`."""
        records = []
        for _, connection in self.processes:
            connection.send(small)
            records += connection.recv()
        return records


def _serve(variant: str, program: str, batch: int, size: int, connection) -> None:
    import torch

    cuda = torch.cuda.is_available()
    name = f"torch {variant} {program}"
    runs = _build(variant, program, batch, size)

    def wait(_):
        if cuda:
            torch.cuda.synchronize()

    compiled = {}
    for mode, run in runs.items():
        begin = time.perf_counter()
        wait(run(0))
        compiled[mode] = time.perf_counter() - begin
        notice(f"{name} {mode}: first step {compiled[mode]:.0f} s")
        if cuda:
            torch.cuda.empty_cache()  # for the other processes
    connection.send("ready")
    small = connection.recv()
    records = []
    for mode, run in runs.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        taken = seconds(run, wait, small=small)
        record = {"variant": variant, "program": program, "mode": mode, "batch": batch, "seconds": taken}
        if cuda:
            record["peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
        records.append(record | {"compile": compiled[mode]})
        notice(f"{name} {mode}: {1e3 * taken:.1f} ms")
    connection.send(records)


def _build(variant: str, program: str, batch: int, size: int) -> dict[str, Callable]:
    """Returns a training step per mode: bfloat16 by autocast, channels-last, fused AdamW."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    model: Any  # PyTorch's types do not know that modules take a memory format
    if program == "pretraining":
        from experiments.benchmarks.torch_peer import FCMAE

        model = FCMAE(variant)
    else:
        import timm

        model = timm.create_model(f"convnextv2_{variant}", drop_path_rate=0.1)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=device == "cuda"
    )

    def step_of(forward):
        def step(_):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                loss = forward(images)
                if program != "pretraining":
                    loss = torch.nn.functional.cross_entropy(loss.float(), labels)
            loss.backward()
            optimizer.step()

        return step

    return {"eager": step_of(model), "compile": step_of(torch.compile(model))}
