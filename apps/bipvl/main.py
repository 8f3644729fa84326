"""BiPVL Label: the MONAI Label app (`monailabel start_server --app apps/bipvl`), and the same work without a server.

python apps/bipvl/main.py train|infer|evaluate|concepts|tasks|studies --help
"""

from lib.app.bipvl import BiPVLApp  # MONAI Label finds the app class among this module's members

__all__ = ["BiPVLApp"]

if __name__ == "__main__":
    from lib.app.cli import cli  # seconds to import (OpenAI's client), which no server and no round of one needs

    cli()
