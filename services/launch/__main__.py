"""`python -m services.launch` is `rhizome`."""

from services.launch.main import main

main()
