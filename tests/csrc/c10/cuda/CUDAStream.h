// Stands in for torch's header under the emulator: there is one stream.
#pragma once

typedef struct CUstream_st* cudaStream_t;

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream() { return nullptr; }

}  // namespace c10::cuda
