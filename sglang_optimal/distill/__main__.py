from sglang_optimal.distill.cli import entry_point

if __name__ == "__main__":
    entry_point()
