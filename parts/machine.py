"""What a run runs on: processes, their devices, memory and speed. Nothing here knows of runs or files."""
import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

from common import progress

# ---------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The process group: this process's rank, how many there are, its device. `main` prints and writes."""
    rank: int
    size: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        if self.size > 1:
            self.sum(torch.zeros(1))

    def sum(self, tensor):
        """Sum over the ranks, in place (CPU tensors by gloo, CUDA tensors by nccl); returns the tensor."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """(n, ...) of each rank, equal n -> (size n, ...) in the order of ranks, on all of them."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def of_main(self, numbers):
        """{name: number} of the main rank, on every rank: what decides how a run goes on must not differ."""
        values = torch.tensor(list(numbers.values()), dtype=torch.float64) * self.main
        return dict(zip(numbers, self.sum(values).tolist()))

    def any(self, flag):
        """True on every rank where it is true on one of them, so that all leave the loop at the same step."""
        return bool(self.sum(torch.tensor([float(flag)])).item() > 0)


def init_ranks(device="auto", dtype="float32"):
    """torchrun's environment -> Ranks; one process without torchrun. A second call finds the same group.

    mps: an Apple GPU, never chosen by auto; one process, `dtype` float32, PyTorch 2.5 or later.
    """
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise SystemExit(f"--device {device}: choose auto, cpu, cuda or mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if not use_cuda:
        keep_freed_memory()
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "mps":
        if not (torch.backends.mps.is_available() and torch.amp.is_autocast_available("mps")):
            raise SystemExit("--device mps: needs an Apple GPU and PyTorch 2.5 or later, built for it; use "
                             "--device cpu")
        if size > 1:
            raise SystemExit(f"--device mps: torchrun started {size} processes, but a Mac has one GPU; start "
                             "it without torchrun")
        if dtype != "float32":  # no loss scaler in 2.5, and no gain from half precision that we know of
            raise SystemExit(f"--dtype {dtype}: --device mps computes in float32 alone")
        return Ranks(0, 1, torch.device("mps"))
    if use_cuda:
        here = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if here > torch.cuda.device_count():  # said by all: who has a GPU must not wait for who has none
            raise SystemExit(f"torchrun started {here} processes, but GPUs: {torch.cuda.device_count()}; "
                             "lower --nproc_per_node")
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = True
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks(rank, size, torch.device("cuda", local) if use_cuda else torch.device("cpu"))


def end_ranks():
    """Leaves the process group and ends the process, without Python's own end; for the end of a script.

    A thread of gloo's may be the last to let go of a tensor. For that it needs Python's lock: once Python is
    ending, the process aborts, though all work is done. On an error's way out the group is not left either:
    the error holds the model and with it the group, whose end would wait for threads that wait for the lock.
    """
    if not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    code = 0 if error is None else getattr(error, "code", 1)
    if error is None:
        dist.destroy_process_group()
    elif not isinstance(error, SystemExit):
        traceback.print_exc()
    elif isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(bool(code)))


def keep_freed_memory(keep=True):
    """Makes glibc keep freed memory, in one pool for all threads. By default large tensors return to the
    system, and each step faults their pages in again; so do a thread's own pools."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    mallopt(M_MMAP_MAX, 0 if keep else 2 ** 16)
    mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1 if keep else 2 ** 17)
    mallopt(M_ARENA_MAX, int(keep))  # 0: as many as glibc likes


def return_freed_memory():
    """Gives freed memory back to the system once: between runs, whose tensors have other sizes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus():
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names if names[0] else [str(i) for i in range(torch.cuda.device_count())]


def side_by_side(jobs, needs={}, workers=0, logs=None, seconds=None):
    """Runs commands, {name: argv}, in `workers` processes, as many as cores where 0; these share the cores.

    needs: {name: names of the jobs that must have ended well before}. logs: folder that keeps what each job
    says, in <name>.txt; then one that fails stops only those that need it, else it ends all of them.
    seconds: a dict that gets how long each ran. -> {name: why it failed}. Where this process is stopped the
    jobs are ended, too. Of several GPUs each worker has one.
    """
    waiting, running, failed, shown, gpus = dict(jobs), {}, {}, 0.0, visible_gpus()
    workers = workers or cores()
    threads = str(max(1, cores() // workers))
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    environment["PYTHONUNBUFFERED"] = "1"
    places = list(range(workers))
    bar = progress(None, len(jobs), " commands", "side by side")
    try:
        while waiting or running:
            ready = [name for name in waiting if not any(
                need in waiting or need in running.values() for need in needs.get(name, ()))]
            for name in ready:
                if lost := [need for need in needs.get(name, ()) if need in failed]:
                    del waiting[name]
                    failed[name] = f"not run, as {lost[0]} failed"
                    bar.update()
                elif places:
                    output = open(logs / f"{name}.txt", "w+") if logs else tempfile.TemporaryFile("w+")
                    place = places.pop(0)
                    if len(gpus) > 1:
                        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
                    # a group of its own: Ctrl-C reaches this process alone, which then ends the jobs once
                    process = subprocess.Popen(waiting.pop(name), stdin=subprocess.DEVNULL, stdout=output,
                                               stderr=subprocess.STDOUT, env=environment,
                                               start_new_session=True)
                    process.output, process.place, process.began = output, place, time.monotonic()
                    running[process] = name
            time.sleep(0.1)
            if time.monotonic() > shown + 5:  # the first command may take minutes
                bar.refresh()
                shown = time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                name = running.pop(process)
                places.append(process.place)
                with process.output as output:
                    output.seek(0)
                    lines = [line for line in output.read().splitlines() if line.strip()]
                if process.returncode:
                    failed[name] = lines[-1] if lines else f"exit status {process.returncode}"
                    if not logs:
                        raise SystemExit(f"{shlex.join(map(str, process.args))}: {failed[name]}")
                if seconds is not None:
                    seconds[name] = time.monotonic() - process.began
                bar.update()
    finally:
        bar.close()
        for process in running:
            process.terminate()
        for process, name in running.items():
            process.wait()
            process.output.close()
            if seconds is not None:
                seconds[name] = time.monotonic() - process.began
    return failed


# ---------------------------------------------------------------------------- speed and memory


def flops_per_token(config, T, mlm=0.0):
    """Floating-point operations (2 a multiply-add) of one token's forward pass in sequences of T tokens.

    A layer: 2 (4 C^2 + 2 C I) for the linear maps, 4 T C for q k' and the weighted sum. mlm: share of the
    tokens with an MLM head, 2 (C^2 + C V) each. Training takes 3 times as many. Only matrix products count,
    as usual for MFU.
    """
    C = config.hidden
    layer = 2 * (4 * C * C + 2 * C * config.intermediate) + 4 * T * C
    return config.layers * layer + mlm * 2 * (C * C + C * config.vocab_size)


def memory_report(model, config, batch, T, logits=0.15, beside=(), anew=False, more=0):
    """One line: parameters, memory of training on `batch` sequences of T tokens.

    Estimated in float32: 16 bytes a parameter for weight, gradient and AdamW's two moments; for backward
    11 C + 2 I numbers a token and layer, on a CPU 3 H T more for attention; 3 V for the share `logits` of the
    tokens, at which the MLM head runs. beside: further (config, sequences, T) of the same step. anew:
    --grad_checkpoint, a layer keeps C, until one by one they are computed again. more: bytes of all else.
    """
    parameters = sum(p.numel() for p in model.parameters())
    on_cpu, total = next(model.parameters()).device.type == "cpu", 16 * parameters + more
    passing = []  # the logits and, anew, one layer: not at the same time
    for shape, sequences, tokens in ((config, batch, T), *beside):
        kept = 11 * shape.hidden + 2 * shape.intermediate + on_cpu * 3 * shape.heads * tokens
        total += 4 * sequences * tokens * shape.layers * (shape.hidden if anew else kept)
        passing += [4 * sequences * tokens * n for n in (logits * 3 * shape.vocab_size, kept)[:1 + anew]]
    total += max(passing) if anew else sum(passing)
    return (f"{parameters / 1e6:.2f} M parameters; about {total / 1e9:.3g} GB for weights, AdamW and the "
            f"activations of {batch} x {T} tokens")


# dense peak of one device in TFLOP/s: (name in torch.cuda.get_device_name, bf16 or fp16, fp32 through TF32)
PEAK_TFLOPS = (("GH200", 989, 494), ("H200", 989, 494), ("H100 PCIe", 756, 378), ("H100", 989, 494),
               ("B200", 2250, 1100), ("A100", 312, 156), ("A800", 312, 156), ("L40S", 362, 183),
               ("L4", 121, 60), ("A10", 125, 62), ("RTX 4090", 165, 83), ("RTX 3090", 71, 36),
               ("V100", 125, 15.7), ("T4", 65, 8.1), ("2080 Ti", 54, 13.4))


@functools.cache
def peak_flops(device, dtype):
    """FLOP/s that MFU is counted against: a GPU's data sheet, or a matmul timed now on a CPU; 0 = unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, half, single in PEAK_TFLOPS:
            if part in name:
                return 1e12 * (single if dtype == torch.float32 else half)
    if device.type != "cpu":
        return 0.0
    a, best = torch.randn(768, 768, dtype=dtype, generator=torch.Generator().manual_seed(0)), math.inf
    began = time.perf_counter()
    while time.perf_counter() - began < 0.2:  # a second product may take that long without bf16 instructions
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768 ** 3 / best


def move(batch, device):
    """Dict of CPU tensors -> the device, from pinned memory and without waiting where that is a CUDA GPU."""
    if device.type == "cpu":
        return batch
    pin = torch.Tensor.pin_memory if device.type == "cuda" else lambda x: x
    return {k: pin(v).to(device, non_blocking=device.type == "cuda") if torch.is_tensor(v) else v
            for k, v in batch.items()}


def generator_of(device):
    """The module whose get_rng_state and set_rng_state are those of a device's default generator."""
    return torch if device.type == "cpu" else getattr(torch, device.type)


def peak_memory_mb(device):
    """Highest memory so far: allocated on the GPU, or the process's resident set, in MB (1e6 bytes); MPS
    counts no peak and tells what its driver holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
