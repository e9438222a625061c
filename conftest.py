pytest_plugins = ["lowbit.pytest_plugin"]
