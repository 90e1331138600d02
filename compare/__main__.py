"""`python -m compare run | table | charts`."""

from .cli import main

raise SystemExit(main())
