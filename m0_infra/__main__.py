"""`python -m m0_infra`: see `python -m m0_infra --help`."""

from .cli import main

raise SystemExit(main())
