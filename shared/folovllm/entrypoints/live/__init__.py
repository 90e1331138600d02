"""An engine at work, as somebody who watches it is shown."""
