"""``python -m benchmarks.sizing``."""

from .run import main

raise SystemExit(main())
