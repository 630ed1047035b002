"""`python -m services.bench` is `rhizome bench`. Client processes import it again, guarded."""

from services.bench.main import main

if __name__ == "__main__":
    main()
