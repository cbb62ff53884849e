"""The command that serves a page to try a model in."""

import ipaddress
import socket
from typing import Annotated

import typer

from tokenstep.cli.options import (
    AcceleratorName,
    Device,
    ModelName,
    PolicyText,
    PrecisionOf,
    Side,
    Threads,
    load_any,
    max_side_of,
)
from tokenstep.errors import TokenstepError
from tokenstep.terminal import complain, require_extra

app = typer.Typer()


@app.command("demo")
def demo_command(
    model: ModelName = "road",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")
    ] = 7860,
    max_side: Side = None,
    accelerator: AcceleratorName = None,
    policy: PolicyText = None,
    precision: PrecisionOf = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Serve a page on this machine to try the models in: drop a picture, turn the knob.

    MODEL and the shipped models can be chosen there. Ctrl-C ends it.
    """
    require_extra("gradio", extra="demo")
    from tokenstep.hub import shipped_models
    from tokenstep.serve.demo import Demo, warm_up

    side = max_side_of(max_side)
    with _listen(host, port) as listening:
        names = dict.fromkeys([model, *shipped_models()])
        own = {"accelerator": accelerator, "policy": policy}
        models = {
            name: load_any(name, device, threads, precision, **(own if name == model else {}))
            for name in names
        }
        for network in models.values():
            warm_up(network)
        from tokenstep.serve.page import serve

        print(f"tokenstep demo: {_address(listening)} (Ctrl-C ends it)", flush=True)
        serve(Demo(models, side), model, listening)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        TokenstepError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = f"cannot be listened on ({error})"
        raise TokenstepError(f"{host}:{port}: {reason}; give another --host or --port") from error
    if not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        complain(f"--host {host}: whoever reaches this machine can use the page")
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
