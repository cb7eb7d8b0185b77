"""The doors that compute on a GPU, one after the other: whether each ends well, what it says, its time.

    python tests/benchmarks/gpu_doors.py STORE RUNS [--ct FILE FILE] [--device cpu]

STORE has scans with labels in the splits train and validation (data_prep/openkbp.yaml makes one); of two CT files the
first is segmented and matched to the second. Networks are small: what is looked for are faults that no CPU shows (a
tensor left on the host, a function that is not compiled), no speed.
Needs all that the package needs, Ray too: a command line each, as a user types it.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

SMALL = ["encoder.width=8", "encoder.depths=[1,1,2,1]", "heads.hidden=256", "heads.out=64"]
VIEWS = ["views.size=[32,64,64]", "views.foreground=true"]
BY_PLACE = ["align.flip=false", "align.more_strides=[[2,4,4],[4,8,8]]", "loss.kind=contrast", "loss.displacement=1"]
STEPS = ["max_steps=12", "train.log_every=4", "train.checkpoint_every=12"]
SECONDS = 240  # of one door at most


def commands(store: str, runs: Path, device: str, ct: list[str]) -> dict[str, list[str]]:
    """Name -> door and its arguments; later ones use what earlier ones leave."""
    on, index = f"train.device={device}", f"index={store}"
    learn = [index, *SMALL, *VIEWS, *STEPS, on, "global_batch_size=8", "health.every=4", "split=train"]
    pretrained, finetuned = runs / "by place", runs / "finetuned"
    judged = [
        "split=train",
        "test_split=validation",
        "num_scans=2",
        "num_test_scans=2",
        "decoder_seeds=1",
        "ends=false",
    ]
    tune = ["max_steps=12", "global_batch_size=2", "patch.size=[32,64,64]", "num_scans=4", "decoder=light"]
    predict = ["predict", f"run={finetuned}", f"input={ct[0]}", f"output={runs / 'labels.nii.gz'}"] if ct else []
    match = ["match", f"init={pretrained}", f"a={ct[0]}", f"b={ct[1]}", f"output={runs / 'match'}"] if ct else []
    with_files = {"predict": [*predict, f"inference.device={device}"], "match": [*match, "voxel=[5,5,5]"]}
    return {
        "the paper's loss": ["pretrain", *learn, f"run={runs / 'paper'}"],
        "by place": ["pretrain", *learn, *BY_PLACE, f"run={pretrained}"],
        "by place, all on the GPU": ["pretrain", *learn, *BY_PLACE, f"run={runs / 'all'}", "stream.on_gpu=all"],
        "byol": ["pretrain", *learn, f"run={runs / 'byol'}", "method=byol"],
        "genesis": ["pretrain", *learn, f"run={runs / 'genesis'}", "method=genesis", "train.compile=off"],
        "probe": ["probe", index, f"init={pretrained}", "judges=[voxels,decoder,matching]", *judged],
        "finetune": ["finetune", index, f"init={pretrained}", f"run={finetuned}", *tune, SMALL[0], SMALL[1], on],
        "evaluate": ["evaluate", index, f"run={finetuned}", "split=validation", f"inference.device={device}"],
        "embed": ["embed", index, f"init={pretrained}", f"output={runs / 'embed'}"],
        **(with_files if ct else {}),
        "bench": ["bench", index, *SMALL, *VIEWS, on, "global_batch_size=32", "bench_s=2"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="the doors that compute on a GPU")
    parser.add_argument("store")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ct", nargs=2, default=[], help="two CT files")
    parser.add_argument("--only", nargs="+", help="names of commands")
    args = parser.parse_args()
    failed = []
    for name, (door, *words) in commands(args.store, args.runs, args.device, args.ct).items():
        if args.only and name not in args.only:
            continue
        began = time.monotonic()
        code, text = run(door, words)
        print(f"-- {name}: exit code {code}, {time.monotonic() - began:.0f} s\n{text}", flush=True)
        failed += [name] if code else []
    print(f"failed: {', '.join(failed)}" if failed else "all ended well")
    sys.exit(bool(failed))


def run(door: str, words: list[str]) -> tuple[int, str]:
    """Exit code and the last lines of a door's output, those on stderr marked."""
    command = [sys.executable, "-m", f"pgl_ray.{door}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        output, errors = ((part or b"").decode(errors="replace") for part in (late.stdout, late.stderr))
        return 124, f"{last_lines(output, errors)}\n  not done after {SECONDS} s"
    return done.returncode, last_lines(done.stdout, done.stderr)


def last_lines(output: str, errors: str) -> str:
    lines = [f"  {line}" for line in output.splitlines()[-8:]]
    return "\n".join(lines + [f"  stderr: {line}" for line in errors.splitlines()[-8:]])


if __name__ == "__main__":
    main()
