// Stands in for torch's header under the emulator.
#pragma once

#include <c10/util/Exception.h>

extern "C" void take_error(char* text, size_t size);  // of emulated.cpp

#define C10_CUDA_KERNEL_LAUNCH_CHECK()    \
  do {                                    \
    char text[200] = {};                  \
    take_error(text, sizeof(text));       \
    TORCH_CHECK(text[0] == '\0', text);   \
  } while (false)
