// Ops are called by their C++ names here, and registered nowhere.
#pragma once
