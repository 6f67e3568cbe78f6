"""`python -m benchmarks.roofline`."""

from benchmarks.roofline.published import main

if __name__ == "__main__":
    main()
