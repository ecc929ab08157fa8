"""Names that users write for models and data: folders, hub names, and what ships with Klippo."""

from klippo.demo import demo_path
from klippo.errors import ConfigError

DEMO_PREFIX = "demo:"


def resolve(name: str) -> str:
    """`demo:policy` as the path inside the package; every other name unchanged.

    Raises ConfigError for a `demo:` name that does not exist.
    """
    if not name.startswith(DEMO_PREFIX):
        return name
    try:
        return str(demo_path(name.removeprefix(DEMO_PREFIX)))
    except ValueError as error:
        raise ConfigError(str(error)) from None
