# CMake reads this inside llama.cpp (install_llama_cpp.sh says so). llama-cpp-python asks for llama.cpp's `common` library
# and loads it nowhere. Without it, and the HTTP library it needs, compiling takes half the time: 4 min 54 s instead of
# 10 min 25 s on two cores of an EPYC (Zen 3), one build each; the other libraries are the same.
set(LLAMA_BUILD_COMMON OFF)
