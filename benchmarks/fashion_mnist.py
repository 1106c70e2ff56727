"""FedAvg and FedDIP on Fashion-MNIST with LeNet-5: the table of docs/results.md.

``python -m benchmarks.fashion_mnist --out runs/fashion-mnist`` plays every method and seed, each
in a run folder of its own, and prints the table in Markdown. Runs that are finished are not played
again and runs that were broken off go on, so the command can be repeated until it ends.
The protocol is the preset `feddip-fashion-mnist` (50 clients, 5 a round, 5 local epochs of batches
of 128); every round is tested.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys

METHODS = {
    "FedAvg": ["--algorithm", "fedavg"],
    "FedDIP 0.80": ["--algorithm", "feddip", "--sparsity", "0.8"],
    "FedDIP 0.90": ["--algorithm", "feddip", "--sparsity", "0.9"],
    "FedDIP 0.95": ["--algorithm", "feddip", "--sparsity", "0.95"],
    "FedDIP 0.90 without penalty": ["--algorithm", "feddip_without_penalty", "--sparsity", "0.9"],
}
LAUNCH = "from fedjaxprune.experiment.cli import main; main()"
MIB = 8 * 2**20  # bits


def play(name, seed, *, out, rounds, cpus):
    """Run or continue one member; give its folder."""
    folder = out / f"{name.lower().replace(' ', '-')}-seed{seed}"
    if (folder / "summary.json").exists():
        return folder
    command = [sys.executable, "-c", LAUNCH, "run"]
    if (folder / "config.yaml").exists():
        command += ["--resume", str(folder)]
    else:
        options = ["--rounds", str(rounds), "--seed", str(seed), "--eval-every", "1"]
        command += ["feddip-fashion-mnist", *METHODS[name], *options, "--out", str(folder)]
    if cpus is not None:  # one job, one core: small networks gain little from a second one
        cpu = cpus.get()
        os_pin = ["taskset", "--cpu-list", str(cpu)]
        try:
            subprocess.run([*os_pin, *command], check=True, stdout=subprocess.DEVNULL)
        finally:
            cpus.put(cpu)
    else:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"finished: {folder.name}", file=sys.stderr, flush=True)
    return folder


def last_ten(folder):
    """Average the test accuracy of the last ten rounds, in percent."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return 100 * statistics.fmean(line["test_accuracy"] for line in lines[-10:])


def row(name, folders):
    """Merge the seeds of one method to a row of the table."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    accuracies = [last_ten(folder) for folder in folders]
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    up = statistics.fmean(s["uplink_parts"]["values"] for s in summaries) / MIB
    down = statistics.fmean(s["downlink_parts"]["values"] for s in summaries) / MIB
    masks = statistics.fmean(s["mask_bits"] for s in summaries) / MIB
    final = statistics.fmean(s["sparsity"] for s in summaries)
    each = " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    return (
        f"| {name} | {final:.4f} | {statistics.fmean(accuracies):.2f} ± {deviation:.2f} "
        f"| {each} | {up:.2f} | {down:.2f} | {masks:.2f} |"
    )


def main():
    parser = argparse.ArgumentParser(description="FedAvg and FedDIP on Fashion-MNIST with LeNet-5.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run folders")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of every run (200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs side by side, each on one core (1 takes all cores)",
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cpus = None
    if options.jobs > 1:
        cpus = queue.Queue()
        for cpu in sorted(os.sched_getaffinity(0))[: options.jobs]:
            cpus.put(cpu)
    members = [(name, seed) for seed in options.seeds for name in METHODS]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        folders = dict(
            zip(
                members,
                pool.map(
                    lambda m: play(*m, out=options.out, rounds=options.rounds, cpus=cpus), members
                ),
                strict=True,
            )
        )
    print("| method | sparsity | accuracy, last ten rounds, % | by seed | up | down | masks down |")
    print("|---|---|---|---|---|---|---|")
    for name in METHODS:
        print(row(name, [folders[name, seed] for seed in options.seeds]))


if __name__ == "__main__":
    main()
