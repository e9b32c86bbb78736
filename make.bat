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
if /i "%~1"=="QUICK" goto quick
if /i "%~1"=="all" goto word
if /i "%~1"=="test" goto word
if /i "%~1"=="lint" goto word
echo error: make knows all, test, lint and QUICK=1, not %~1 1>&2
exit /b 2

:quick
set "FLAGS=--quick"
shift
shift
goto next

:word
set "WHAT=%~1"
shift
goto next

:install
call :try py -3.12
call :try py -3.11
call :try python
call :try python3
if not defined PYTHON echo error: Python 3.11 or 3.12 is needed; install it from python.org, then run make again 1>&2
if not defined PYTHON exit /b 2
%PYTHON% install.py
if errorlevel 1 exit /b 2
goto %WHAT%

:all
"%PY%" train.py %FLAGS%
if errorlevel 1 exit /b %errorlevel%
"%PY%" benchmark.py %FLAGS%
exit /b %errorlevel%

:test
"%PY%" -m pytest -n 2 --dist worksteal
exit /b %errorlevel%

:lint
"%PY%" -m ruff check .
if errorlevel 1 exit /b %errorlevel%
"%PY%" -m ruff format --check .
if errorlevel 1 exit /b %errorlevel%
"%PY%" -m pyright --project pyproject.toml
exit /b %errorlevel%

:try
if defined PYTHON exit /b 0
%* -c "import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))" >nul 2>nul
if not errorlevel 1 set "PYTHON=%*"
exit /b 0
