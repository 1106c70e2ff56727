"""Send one weight in a hundred, with and without error feedback, on real digits.

Each client sends only the largest entries of its delta. What it does not send is either lost, or
kept as the client's own residual and added to its next delta. Every run has a folder, as the runs
of the command have. Run with ``python examples/error_feedback_top_k.py``.
"""

import tempfile

import fedjaxprune as fjp


def uplinks(fraction):
    """List what is compared."""
    return {
        "everything": {"name": "identity"},
        "top-k": {"name": "top_k", "fraction": fraction},
        "top-k with error feedback": {
            "name": "top_k",
            "fraction": fraction,
            "error_feedback": True,
        },
    }


def main(*, num_rounds=40, num_clients=20, cohort_size=10, fraction=0.01, seed=0, **settings):
    """Compare the uplinks; give accuracy and bits by name. All runs have the same `settings`."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, uplink in uplinks(fraction).items():
            run = fjp.run(
                method="fedavg",
                uplink=uplink,
                epochs=1,
                num_rounds=num_rounds,
                num_clients=num_clients,
                cohort_size=cohort_size,
                seed=seed,
                folder=f"{folder}/{name.replace(' ', '-')}",
                **settings,
            )
            accuracy = run.summary["test"]["accuracy"]
            bits = run.summary["traffic"]["up"]["total_bits"]
            results[name] = accuracy, bits
            print(f"{name}: test accuracy {accuracy:.3f}, {bits / 8 / 2**20:.2f} MiB sent up")
    return results


if __name__ == "__main__":
    main()
