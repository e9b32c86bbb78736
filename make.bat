@echo off
rem make            set up, train what is not trained, benchmark every backend, write tables and charts
rem make QUICK=1    the same path at small sizes in about a minute, into results\quick
rem make test       the tests           make lint    ruff and pyright
rem In PowerShell: .\make QUICK=1.  Nothing has to be activated.
setlocal
cd /d "%~dp0"
set "PY=.venv\Scripts\python.exe"
set "WHAT=all"
set "FLAGS="

:next
if "%~1"=="" goto install
if /i "%~1"=="QUICK" (
    set "FLAGS=--quick"
    shift
    shift
    goto next
)
for %%w in (all test lint) do if /i "%~1"=="%%w" (
    set "WHAT=%%w"
    shift
    goto next
)
echo error: make knows all, test, lint and QUICK=1, not %~1 1>&2
exit /b 2

:install
set "IS_RIGHT=import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))"
for %%p in ("py -3.12" "py -3.11" "python" "python3") do (
    if not defined PYTHON %%~p -c "%IS_RIGHT%" >nul 2>nul && set "PYTHON=%%~p"
)
if not defined PYTHON (
    echo error: Python 3.11 or 3.12 is needed; install it from python.org, then run make again 1>&2
    exit /b 2
)
%PYTHON% install.py || exit /b 2
goto %WHAT%

:all
"%PY%" train.py %FLAGS% && "%PY%" benchmark.py %FLAGS%
exit /b %errorlevel%

:test
"%PY%" -m pytest -n 2 --dist worksteal
exit /b %errorlevel%

:lint
"%PY%" -m ruff check . && "%PY%" -m ruff format --check . && "%PY%" -m pyright
exit /b %errorlevel%
