"""All numbers of a search in a CSV file beside TensorBoard's.  python -m examples.csv_logger --dataset cifar10"""

import search
from run.loggers import Logger


class CsvLogger(Logger):
    def __init__(self, folder, config):
        self.path, self.lines = folder / "scalars.csv", []

    def scalar(self, tag, value, step):
        self.lines.append(f"{step},{tag},{value}\n")

    def flush(self):  # before each checkpoint
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(self.lines)
        self.lines.clear()

    def close(self):
        self.flush()


if __name__ == "__main__":
    search.main(loggers=[CsvLogger])
