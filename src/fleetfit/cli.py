"""The ``fleetfit`` command: subcommands are imported only when they are called."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import NoReturn

import click
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

# Name of the subcommand -> (module, object, short help), so that `--help` imports none of them.
SUBCOMMANDS: dict[str, tuple[str, str, str]] = {
    "calibrate": ("fleetfit.calibrate", "calibrate", "Compare predicted with measured memory."),
    "catalog": ("fleetfit.catalog", "catalog", "Look at catalog entries and pin their files."),
    "lab": ("fleetfit.lab.command", "lab", "Run the embedded lab: hosts in containers on this machine."),
    "verify": ("fleetfit.verify", "verify", "Ask the deployed services whether they really answer."),
    "what-fits": ("fleetfit.what_fits", "what_fits", "Show which quantizations fit a GPU or a host."),
    "wheelhouse": ("fleetfit.wheelhouse", "wheelhouse", "Build the locked Python packages for hosts."),
}


class LazyGroup(click.Group):
    """A group whose subcommands live in modules of their own, imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands' names, sorted."""
        return sorted(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the subcommand ``cmd_name``; None where there is no such name."""
        if cmd_name not in SUBCOMMANDS:
            return None
        module_name, attribute, _ = SUBCOMMANDS[cmd_name]
        command = getattr(importlib.import_module(module_name), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module_name}.{attribute} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUBCOMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("fleetfit"), prog_name="fleetfit")
def cli() -> None:
    """Turn bare Linux hosts into a fleet that serves local LLMs."""


def main() -> NoReturn:
    """Run the command; a FleetfitError becomes one line on stderr and exit code 2."""
    try:
        # Without its standalone mode click returns the code of an Exit instead of raising it.
        code = cli.main(prog_name="fleetfit", standalone_mode=False)
    except FleetfitError as error:
        click.echo(f"fleetfit: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        # A file or a folder that is not what the user takes it for, or a full disk: never a traceback.
        where = f": {error.filename}" if error.filename else ""
        click.echo(
            f"fleetfit: {error.strerror or error}{where}. Look at that path, its permissions and the disk.",
            err=True,
        )
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("fleetfit: interrupted; the same command goes on from here", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
