"""`python -m services.cache_index`."""

from services.cache_index.main import main

if __name__ == "__main__":
    main()
