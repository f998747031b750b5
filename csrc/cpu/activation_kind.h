// The activation functions that an epilogue can apply; their arithmetic is in activation.h.
#pragma once

namespace tcompress::cpu {

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

}  // namespace tcompress::cpu
