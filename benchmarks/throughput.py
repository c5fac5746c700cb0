"""Images per second of every step, and the share of the time that each model takes. See README.md beside it.

    python benchmarks/throughput.py --profile embedded --images 4
    python benchmarks/throughput.py --profile paper --random --size 640x480 --set collection=drawn --set device=cuda

What is compared (precisions; threads against processes) is measured side by side in one run: ratios, not records.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fmbseg import cli, profiles
from fmbseg.data import images, label_spaces
from fmbseg.models import sam_decoder
from fmbseg.models.clip import CLIP_NAMES, LIT, load_clip
from fmbseg.models.encoders import load_encoder
from fmbseg.models.sam import load_sam
from fmbseg.models.texts import class_texts
from fmbseg.params import ModuleParams
from fmbseg.runs import cache, label, records
from fmbseg.runs.cache import Models
from fmbseg.schemas import EvaluateRun
from fmbseg.stage1 import detection, features, label_masks, query_sam
from fmbseg.stage2 import alignment, training
from fmbseg.stage2.segmenter import AlignedEncoder, Segmenter

STEPS = ("CLIP features", "SAM embedding", "Stage 1.1 decoding", "automatic masks", "encoder patches", "training", "segmentation")
WARM_UP = 1  # images before the clock starts; the peak of memory is theirs


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: str) -> str:
    """The name of the processor that does the work."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in told.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores()} cores"


def keep(
    name: str, params: EvaluateRun, protocol: dict, started: float, out: Path | None, images: int = 0, notes: Sequence[str] = ()
) -> Path:
    """Write the record of a benchmark, to results/<profile>/benchmarks unless ``out`` is given; returns its path.

    started: ``time.perf_counter()`` at the beginning; images: how many were measured; notes: beside those of the parameters.
    """
    out = out or records.results_folder(params) / "benchmarks" / f"{name}.json"
    record = records.Record(
        "benchmark",
        name,
        params.model_dump(),
        params.collection,
        images=images,
        seconds=round(time.perf_counter() - started, 1),
        hardware=hardware(params.device),
        protocol=protocol,
        notes=[*records.notes_of(params), *notes],
    )
    record.write(out.parent, out.stem)
    print(f"record: {out}")
    return out


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> None:
    """Let the peak that ``peak_memory`` tells begin anew (on a CPU: Linux), without the memory that is kept for later tensors."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str = "cpu") -> int:
    """Bytes that this process held at most, models included: of the GPU's memory, or of the machine's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(told["VmHWM"].split()[0])


class Clock:
    """Seconds spent inside each model, by its name: ``watch`` an object's method and every call of it counts."""

    def __init__(self, device: str):
        self.device, self.seconds = device, {}

    def watch(self, name: str, thing: object, method: str) -> None:
        plain = getattr(thing, method)

        @functools.wraps(plain)
        def timed(*args, **kwargs):
            synchronise(self.device)
            started = time.perf_counter()
            out = plain(*args, **kwargs)
            synchronise(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return out

        setattr(thing, method, timed)


class Pipeline:
    """The models of one set of parameters, and each step as (what is done before the clock starts, what is timed)."""

    def __init__(self, params: EvaluateRun, arrays: list[np.ndarray]):
        self.params, self.images, p = params, arrays, params
        self.clip = load_clip(p.clip, p.device, p.crop_input, p.precision)  # models of its own, to be watched
        self.sam, self.encoder = load_sam(p.sam, p.device, p.precision), load_encoder(p.encoder, p.device, p.precision)
        self.space = label_spaces.vocabulary(p.vocabulary)
        self.texts = class_texts(self.clip, self.space, p.templates)
        side = p.image_size // self.encoder.patch * self.encoder.patch
        self.squares = [torch.from_numpy(images.resize(x, (side, side)))[None].to(p.device) for x in arrays]
        self.features = [features.extract(x, self.clip, p) for x in arrays]
        scale = cache.vote_scale(self.texts, p)
        self.found = [detection.detect(f, self.texts, p, scale) for f in self.features]
        self.module = alignment.Alignment(self.encoder.width, self.texts.features.shape[1], ModuleParams(**p.part(ModuleParams)))
        self.module.to(p.device)
        self.optimiser = torch.optim.SGD(self.module.parameters(), 1e-3, momentum=0.9)
        self.segmenter = Segmenter(AlignedEncoder(self.encoder, self.module, "", p.device), self.clip, p, p.templates)
        self.clock = Clock(p.device)
        for name, thing, method in (
            ("CLIP", self.clip, "encode_crops"),
            ("SAM encoder", self.sam.model.image_encoder, "forward"),
            ("SAM decoder", self.sam.model.prompt_encoder, "forward"),
            ("SAM decoder", sam_decoder, "decode"),
            ("encoder", self.encoder, "encode"),
            ("alignment module", self.module, "forward"),
        ):
            self.clock.watch(name, thing, method)

    def work(self, step: str) -> tuple[Callable[[int], object], Callable[[int], object]]:
        """(before, timed), each a function of the image's number."""
        p, arrays = self.params, self.images
        nothing, embed = (lambda i: None), (lambda i: self.sam.set_image(arrays[i]))
        return {
            "CLIP features": (nothing, lambda i: features.extract(arrays[i], self.clip, p)),
            "SAM embedding": (lambda i: self.sam.set_image(arrays[i - 1]), embed),
            "Stage 1.1 decoding": (
                embed,
                lambda i: query_sam.query_masks(arrays[i], self.features[i], self.found[i], self.texts, self.sam, p),
            ),
            "automatic masks": (embed, lambda i: label_masks.automatic_masks(arrays[i], self.sam, p)),
            "encoder patches": (nothing, lambda i: self.encoder.encode(self.squares[i])),
            "training": (lambda i: (self.module.train(), self.batch), self.train_step),
            "segmentation": (lambda i: self.module.eval(), lambda i: self.segmenter.segment(arrays[i], self.space)),
        }[step]

    @functools.cached_property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(patches of a batch, random labels of all of them, texts)."""
        p, count = self.params, self.params.images_per_batch
        patches = torch.cat([self.encoder.encode(self.squares[i % len(self.squares)]) for i in range(count)]).clone()
        texts = self.texts.prototypes().to(p.device)
        labels = torch.randint(len(texts), (count * patches.shape[2] * patches.shape[3],), generator=torch.Generator().manual_seed(0))
        return patches, labels.to(p.device), texts

    def train_step(self, _: int) -> None:
        patches, labels, texts = self.batch
        z = self.module(patches).permute(0, 2, 3, 1).flatten(0, 2)
        loss = training.loss_function(self.params)(z, labels, texts)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def run(self, step: str, i: int, warm_up: bool) -> tuple[float, dict[str, float]]:
        """(seconds, seconds in each model) of one image (training: of one batch). In a warm-up the peak of memory begins anew."""
        before, timed = self.work(step)
        before(i)
        if warm_up:
            reset_peak(self.params.device)
        synchronise(self.params.device)
        self.clock.seconds = {}
        started = time.perf_counter()
        timed(i)
        synchronise(self.params.device)
        return time.perf_counter() - started, dict(self.clock.seconds)  # a copy: what is done before the next start adds to it


def measure(pipelines: dict[str, Pipeline], count: int) -> pd.DataFrame:
    """One row a step and variant; variants take turns image by image, so that other load meets all alike."""
    rows = []
    for step in STEPS:
        taken, peaks = {name: [] for name in pipelines}, dict.fromkeys(pipelines, 0)
        for i in range(-WARM_UP, count):
            for name, pipeline in pipelines.items():
                made = pipeline.run(step, i % count, i < 0)
                if i < 0:
                    peaks[name] = peak_memory(pipeline.params.device)
                else:
                    taken[name].append(made)
        for name, found in taken.items():
            arrays = pipelines[name].params.images_per_batch if step == "training" else 1
            total = sum(seconds for seconds, _ in found)
            inside = {model for _, models in found for model in models}
            shares = {model: round(sum(models.get(model, 0.0) for _, models in found) / total, 3) for model in sorted(inside)}
            seconds = statistics.median(seconds for seconds, _ in found) / arrays
            rows.append({"step": step, "variant": name, "seconds": round(seconds, 5), "images/s": round(1 / seconds, 3), "shares": shares})
            rows[-1]["peak_bytes"] = peaks[name]
        print(
            "  ".join([f"{step:20s}", *(f"{r['variant']}: {r['seconds']:.4f} s an image" for r in rows if r["step"] == step)]), flush=True
        )
    return pd.DataFrame(rows)


def _embed(params: EvaluateRun, arrays: list[np.ndarray], threads: int, ready, done) -> None:
    torch.set_num_threads(threads)
    sam = Models.of(params).sam
    sam.set_image(arrays[-1])
    ready.wait()
    for array in arrays:
        sam.set_image(array)
    done.wait()


def processes_against_threads(params: EvaluateRun, arrays: list[np.ndarray]) -> dict[str, float]:
    """SAM embeddings per second: one process of as many threads as cores, against as many processes of one thread."""
    context, found = multiprocessing.get_context("spawn"), {}
    for processes, threads in ((1, cores()), (cores(), 1)):
        ready, done = (context.Barrier(processes + 1, timeout=1800) for _ in range(2))
        given = (params, arrays, threads, ready, done)
        working = [context.Process(target=_embed, args=given, daemon=True) for _ in range(processes)]
        for process in working:
            process.start()
        ready.wait()
        started = time.perf_counter()
        done.wait()
        found[f"{processes} x {threads}"] = round(processes * len(arrays) / (time.perf_counter() - started), 4)
        for process in working:
            process.join()
    return found


def random_weights(params: EvaluateRun) -> EvaluateRun:
    """The same architectures with random weights: nothing to fetch, the same speed. The stand-in for CLIP keeps its own."""
    plain = {"sam": f"random:{params.sam}", "encoder": "+".join(f"random:{part}" for part in params.encoder.split("+"))}
    if params.clip != LIT:
        plain["clip"] = f"random:{CLIP_NAMES.get(params.clip, params.clip).split(' ')[0]}"
    return params.model_copy(update={k: v for k, v in plain.items() if not getattr(params, k).startswith("random:")})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Images per second of every step.")
    parser.add_argument("--profile", default="embedded", help="folder of params/ to start from")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="any parameter; may be given again")
    parser.add_argument("--images", type=int, default=4, help="images that every step sees (at least 2)")
    parser.add_argument("--size", metavar="WIDTHxHEIGHT", help="scale all images to this size first")
    parser.add_argument("--random", action="store_true", help="random weights of the same architectures")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of a CPU run (default: all cores)")
    parser.add_argument("--compare", nargs="*", choices=("precision", "processes"), default=["precision", "processes"], help="alternatives")
    parser.add_argument("--note", action="append", default=[], help="what a reader of the record has to know, such as other load")
    parser.add_argument("--out", type=Path, help="file of the record (default: results/<profile>/benchmarks/throughput.json)")
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    params = profiles.load("evaluate", options.profile, cli.settings(options.set))
    params = random_weights(params) if options.random else params
    samples = label.collection(params.model_copy(update={"limit": max(options.images, 2)}))
    arrays = [images.read_image(sample.image) for sample in samples]
    if options.size:
        width, height = (int(side) for side in options.size.lower().split("x"))
        arrays = [images.resize(array, (height, width)) for array in arrays]
    name = hardware(params.device)
    print(f"{name}; torch {torch.__version__}, {options.threads} threads; {len(arrays)} images, profile {params.profile}", flush=True)

    precisions = ["fp32", "bf16"] if "precision" in options.compare else [params.precision]
    pipelines = {one: Pipeline(params.model_copy(update={"precision": one}), arrays) for one in precisions}
    frame = measure(pipelines, len(arrays))
    table = frame.pivot(index="step", columns="variant", values="images/s").loc[list(STEPS)]
    ratios = {}
    if len(precisions) == 2:
        table["bf16 / fp32"] = (table["bf16"] / table["fp32"]).round(2)
        ratios["bf16 / fp32"] = table["bf16 / fp32"].to_dict()
    print("\nimages per second\n" + table.to_string())
    print(
        "\npeak memory, GB, all variants' models included\n"
        + (frame.set_index(["step", "variant"])["peak_bytes"] / 1e9).round(2).to_string()
    )
    print("\nshare of the time in each model\n" + "\n".join(f"{r['step']:20s}{r['variant']:6s}{r['shares']}" for _, r in frame.iterrows()))
    if "processes" in options.compare and params.device == "cpu":
        ratios["SAM embeddings per second, processes x threads"] = processes_against_threads(params, arrays)
        print(f"\nSAM embeddings per second, processes x threads: {ratios['SAM embeddings per second, processes x threads']}")

    protocol = {"threads": options.threads, "sizes": [list(x.shape[1::-1]) for x in arrays], "warm_up": WARM_UP}
    protocol |= {"steps": frame.to_dict("records"), "ratios": ratios}
    print()
    keep("throughput", params, protocol, started, options.out, len(arrays), options.note)


if __name__ == "__main__":
    main()
