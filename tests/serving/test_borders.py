import subprocess
import sys

HEAVY = ("torch", "ray", "deepspeed", "mlflow", "onnx", "webdataset", "matplotlib", "pandas", "sklearn", "scipy")


def test_the_service_runs_without_the_trainers_frameworks():
    program = f"import serving.server.process, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
