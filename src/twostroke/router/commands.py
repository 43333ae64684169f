"""The verbs of ``twostroke workers``, which ask a running router. What they need is imported when one is chosen."""

from typing import Annotated

from cyclopts import App, Parameter

from twostroke.messages import Role

app = App(name="workers", help="See the workers of a running router, drain them, change their roles.")

RouterUrl = Annotated[str, Parameter(help="The router.")]
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command(name="list")
def list_workers(*, url: RouterUrl = DEFAULT_URL) -> int:
    """Show who is there, in which role and state."""
    from twostroke.operate import Operator

    return Operator(url).show()


@app.command
def drain(worker: str, /, *, url: RouterUrl = DEFAULT_URL, seconds: float | None = None) -> int:
    """Let a worker finish what it has and leave.

    Parameters
    ----------
    worker
        Its id or URL.
    url
        The router.
    seconds
        Leave then, whatever is still going on. [default: the worker's --drain-timeout]
    """
    from twostroke.operate import Operator

    return Operator(url).drain(worker, seconds)


@app.command(name="role")
def assign(worker: str, role: Role, /, *, url: RouterUrl = DEFAULT_URL) -> int:
    """Use a worker for something else from now on. It keeps its cache, and the requests that it has.

    Parameters
    ----------
    worker
        Its id or URL.
    role
        What for.
    url
        The router.
    """
    from twostroke.operate import Operator

    return Operator(url).assign(worker, role)
