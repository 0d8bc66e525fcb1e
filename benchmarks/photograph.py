"""The beginning of a report as a picture, by the Chromium that comes with PyQt6-WebEngine.

    uv run --with PyQt6-WebEngine python benchmarks/photograph.py REPORT.html PICTURE.png

The benchmarks that run ``ablate`` call it where that package is installed; a browser is not needed.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from memtrain_common.commands.cli import run_command
from memtrain_common.errors import UserError

WIDTH, HEIGHT = 1280, 1050
LIMIT_MS = 60_000


def photograph(report: Path, picture: Path) -> None:
    """In a process of its own: Qt's application wants the main thread, and its libraries stay out of this one."""
    if importlib.util.find_spec("PyQt6") is None:
        print(f"no picture of {report}: PyQt6-WebEngine is not installed (uv run --with PyQt6-WebEngine …)")
        return
    subprocess.run([sys.executable, __file__, report, picture], check=True)


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2 or not Path(argv[0]).is_file():
        raise UserError("give a report that exists and the name of a picture: REPORT.html PICTURE.png")
    os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}  # no screen; root has no sandbox
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu"
    try:
        from PyQt6.QtCore import QTimer, QUrl
        from PyQt6.QtWebEngineCore import QWebEngineSettings
        from PyQt6.QtWebEngineWidgets import QWebEngineView
        from PyQt6.QtWidgets import QApplication
    except ImportError as e:
        raise UserError(f"the picture needs PyQt6-WebEngine ({e}): uv run --with PyQt6-WebEngine python …") from e

    app, view = QApplication(sys.argv[:1]), QWebEngineView()
    view.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    view.resize(WIDTH, HEIGHT)
    view.show()

    def save() -> None:
        app.exit(0 if view.grab().save(argv[1]) else 1)

    view.loadFinished.connect(lambda well: QTimer.singleShot(2000, save) if well else app.exit(1))
    view.load(QUrl.fromLocalFile(str(Path(argv[0]).absolute())))
    QTimer.singleShot(LIMIT_MS, lambda: app.exit(1))
    if app.exec():
        raise UserError(f"{argv[0]} could not be drawn, or {argv[1]} not written")


if __name__ == "__main__":
    sys.exit(run_command(main, prog="python benchmarks/photograph.py"))
