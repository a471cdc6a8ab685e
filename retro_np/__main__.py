"""`python -m retro_np`, the same as `retro-np`."""

from retro_np.cli import main

if __name__ == "__main__":
    main()
