// What a node's fields say: read from TensorRT's field collections, checked, and written back.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

#include "iq/constants.h"

namespace iq
{

// The values of an op's fields; those that an op does not have keep their defaults. They never
// change once they are read, and all clones of a plugin share them.
struct Settings
{
    std::string node; // for messages
    std::vector<float> templates;
    int32_t templateShape[2]{0, 0}; // templates, hidden; zero without templates
    std::vector<int32_t> channels;
    float threshold{0.0F};
    float epsilon{0.0F};
    float scale{1.0F};
    float factor{1.0F};
    int32_t block{1};

    Bytes device; // what the kernels read; empty if nothing
    std::vector<nvinfer1::PluginField> fields; // of the above, for serialisation
    nvinfer1::PluginFieldCollection collection{};
};

// One kind of field.
struct FieldSpec
{
    char const* name;
    nvinfer1::PluginFieldType type;
    // Throws std::invalid_argument with the reason, without the field's name.
    void (*read)(nvinfer1::PluginField const& field, Settings& settings);
    nvinfer1::PluginField (*write)(Settings const& settings);
};

extern FieldSpec const kTemplates;
extern FieldSpec const kTemplateShape;
extern FieldSpec const kChannels;
extern FieldSpec const kThreshold;
extern FieldSpec const kEpsilon;
extern FieldSpec const kScale;
extern FieldSpec const kFactor;
extern FieldSpec const kBlock;

// Reads exactly the fields of `specs`. Throws std::invalid_argument for a field that is missing,
// unknown, there twice, of another type or size, or not in its range.
std::shared_ptr<Settings const> readSettings(std::vector<FieldSpec const*> const& specs,
    std::string node, nvinfer1::PluginFieldCollection const* collection);

} // namespace iq
