"""The command ``fedjaxprune conformance``."""

import os
import sys

import click


@click.command()
@click.argument("name")
@click.option(
    "--fast", is_flag=True, help="Leave out the laws for which rounds are compiled once more."
)
def conformance(name: str, fast: bool) -> None:
    """Hold a method to the laws that every method keeps.

    NAME is a method or variant of `fedjaxprune list method`, FILE.py:NAME or MODULE:NAME. It
    runs under its law_settings with six clients whose answers are known, on the CPU. The exit
    status is 1 if it breaks a law.
    """
    from fedjaxprune import registry
    from fedjaxprune.errors import FedJaxPruneError, first_line

    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most of the time is compiling
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    found = registry.find("method", name)  # whose file may make arrays
    from fedjaxprune.testing import history, laws_of

    settings = {**found.part.law_settings, **found.variant}
    try:
        recorded = history.record(found.part, settings)
    except FedJaxPruneError:
        raise
    except Exception as error:
        click.echo(f"failed  it runs: {type(error).__name__}: {first_line(error)}")
        sys.exit(1)
    given = laws_of(found.part, settings, cost="low" if fast else "any", history=recorded)
    num_passed = 0
    for law, check in given:
        try:
            check()
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            click.echo(f"failed  {law}: {kind}{first_line(error)}")
        else:
            num_passed += 1
            click.echo(f"passed  {law}")
    click.echo(f"{name} keeps {num_passed} of {len(given)} laws.")
    sys.exit(num_passed < len(given))
