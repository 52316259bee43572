"""Runs the tests of this folder, or those whose name matches one of the arguments, and reports in TAP as `node --test` does.

For `cargo xtask test python`, which counts what it prints."""

import logging
import re
import signal
import sys
import time
import traceback
import unittest
from pathlib import Path

# Longest that one test may take, in seconds.
LIMIT = 60


def name_of(test):
    """The sentence that the name of a test is."""
    name = test.id().rpartition(".")[2]
    return name.removeprefix("test_").replace("_", " ")


def tests_of(suite):
    """The tests of a suite of suites."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


def too_long(_number, _frame):
    """Ends the test that runs, wherever it is."""
    raise TimeoutError(f"it takes longer than {LIMIT} s")


class Report(unittest.TestResult):
    """Prints every test as it ends, and the counts."""

    def __init__(self):
        super().__init__()
        self.passed = 0
        self.started = time.perf_counter()

    def startTest(self, test):
        super().startTest(test)
        self.started = time.perf_counter()
        signal.alarm(LIMIT)

    def stopTest(self, test):
        signal.alarm(0)
        super().stopTest(test)

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1
        self.tell("ok", test)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.tell("not ok", test, err)

    def addError(self, test, err):
        super().addError(test, err)
        self.tell("not ok", test, err)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.tell("ok", test)

    def tell(self, verdict, test, err=None):
        took = (time.perf_counter() - self.started) * 1000
        print(f"{verdict} {self.testsRun} - {name_of(test)}\n  ---\n  duration_ms: {took:.3f}\n  ...", flush=True)
        if err is not None:
            for line in "".join(traceback.format_exception(*err)).splitlines():
                print(f"  | {line}", flush=True)

    def finish(self):
        """Prints the counts; whether all is well."""
        failed = len(self.failures) + len(self.errors) + len(self.unexpectedSuccesses)
        skipped = len(self.skipped) + len(self.expectedFailures)
        print(f"# pass {self.passed}\n# fail {failed}\n# skipped {skipped}", flush=True)
        return failed == 0


def main(patterns):
    # It would name everything that takes a tenth of a second.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    found = unittest.defaultTestLoader.discover(str(Path(__file__).parent), "*_test.py")
    # A file that cannot be read is a test that fails, whatever it is named.
    broken = unittest.loader._FailedTest
    wanted = [
        test
        for test in tests_of(found)
        if not patterns or isinstance(test, broken) or any(re.search(pattern, name_of(test)) for pattern in patterns)
    ]
    signal.signal(signal.SIGALRM, too_long)
    report = Report()
    unittest.TestSuite(wanted).run(report)
    return 0 if report.finish() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
