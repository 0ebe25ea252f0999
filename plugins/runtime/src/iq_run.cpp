// iq_run BUNDLE: check a bundle, or generate token ids with it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "iq/bundle.h"
#include "iq/text_session.h"

namespace
{

constexpr char const* kUsage = R"(usage: iq_run BUNDLE --ids 1,2,3 [options]
       iq_run BUNDLE --check [options]

  --check              check all that can be checked without a GPU and TensorRT, and stop
  --ids 1,2,3          the tokens of a prompt; repeat it for a batch
  --max-new N          tokens to generate for each prompt (default 32)
  --temperature T      0, the default, takes the likeliest token
  --top-k K, --top-p P what is sampled from (default: all)
  --seed N             (default 0)
  --graph NAME         the graph (default: the only one)
  --engine NAME        the engine (default: the one that fits the machine)
  --tensorrt FILE      TensorRT's library (default: by its usual name)
  --for-sm N           check for this device, 86 for sm_86, instead of the one that is here
  --for-tensorrt V     check for this TensorRT, such as 10.15.1 or rtx-1.7, instead of the one here
)";

struct Options
{
    std::string bundle;
    std::vector<std::vector<int64_t>> prompts;
    iq::EngineOptions engine;
    iq::Sampling sampling;
    iq::Machine wanted;
    int64_t maxNew{32};
    bool check{false};
};

[[noreturn]] void wrong(std::string const& what)
{
    throw std::invalid_argument(what);
}

// `text` as one number, to its end.
template <typename Number, typename Parse>
Number whole(std::string const& option, std::string const& text, Parse parse)
{
    size_t used = 0;
    Number number{};
    try
    {
        number = static_cast<Number>(parse(text, &used));
    }
    catch (std::exception const&)
    {
        used = 0;
    }
    if (text.empty() || used != text.size())
    {
        wrong(option + " takes a number, not '" + text + "'");
    }
    return number;
}

int64_t integer(std::string const& option, std::string const& text, int64_t low, int64_t high)
{
    auto const number = whole<int64_t>(
        option, text, [](std::string const& t, size_t* used) { return std::stoll(t, used); });
    if (number < low || number > high)
    {
        wrong(option + " lies between " + std::to_string(low) + " and " + std::to_string(high));
    }
    return number;
}

float decimal(std::string const& option, std::string const& text)
{
    return whole<float>(
        option, text, [](std::string const& t, size_t* used) { return std::stof(t, used); });
}

std::vector<std::string> split(std::string const& text, char separator)
{
    std::vector<std::string> parts;
    for (size_t start = 0, end = 0; end != std::string::npos; start = end + 1)
    {
        end = text.find(separator, start);
        parts.push_back(text.substr(start, end == std::string::npos ? end : end - start));
    }
    return parts;
}

iq::TensorRt tensorRt(std::string const& option, std::string const& text)
{
    iq::TensorRt result;
    bool const rtx = text.compare(0, 4, "rtx-") == 0;
    result.flavour = rtx ? iq::Flavour::kRtx : iq::Flavour::kEnterprise;
    auto const parts = split(rtx ? text.substr(4) : text, '.');
    if (parts.size() > result.version.size())
    {
        wrong(option + " takes a version of at most four numbers, not '" + text + "'");
    }
    for (size_t i = 0; i < parts.size(); ++i)
    {
        result.version[i] = static_cast<int32_t>(integer(option, parts[i], 0, 99999));
    }
    return result;
}

std::vector<int64_t> ids(std::string const& option, std::string const& text)
{
    std::vector<int64_t> result;
    for (std::string const& part : split(text, ','))
    {
        result.push_back(integer(option, part, 0, INT32_MAX));
    }
    return result;
}

void setOption(Options& options, std::string const& name, std::string const& value)
{
    if (name == "--ids")
    {
        options.prompts.push_back(ids(name, value));
    }
    else if (name == "--max-new")
    {
        options.maxNew = integer(name, value, 1, INT32_MAX);
    }
    else if (name == "--temperature")
    {
        options.sampling.temperature = decimal(name, value);
    }
    else if (name == "--top-k")
    {
        options.sampling.topK = static_cast<int32_t>(integer(name, value, 0, INT32_MAX));
    }
    else if (name == "--top-p")
    {
        options.sampling.topP = decimal(name, value);
    }
    else if (name == "--seed")
    {
        options.sampling.seed = static_cast<uint64_t>(integer(name, value, 0, INT64_MAX));
    }
    else if (name == "--graph")
    {
        options.engine.graph = value;
    }
    else if (name == "--engine")
    {
        options.engine.engine = value;
    }
    else if (name == "--tensorrt")
    {
        options.engine.library = value;
    }
    else if (name == "--for-sm")
    {
        options.wanted.computeCapability = static_cast<int32_t>(integer(name, value, 10, 9999));
    }
    else if (name == "--for-tensorrt")
    {
        options.wanted.tensorRt = tensorRt(name, value);
    }
    else
    {
        wrong("there is no option " + name);
    }
}

Options parse(int argc, char** argv)
{
    Options options;
    for (int i = 1; i < argc; ++i)
    {
        std::string const argument = argv[i];
        if (argument == "--check")
        {
            options.check = true;
        }
        else if (argument.compare(0, 2, "--") == 0)
        {
            if (i + 1 == argc)
            {
                wrong(argument + " needs a value");
            }
            setOption(options, argument, argv[++i]);
        }
        else if (options.bundle.empty())
        {
            options.bundle = argument;
        }
        else
        {
            wrong("'" + argument + "' is one argument too many");
        }
    }
    if (options.bundle.empty() || options.check == !options.prompts.empty())
    {
        wrong("give a bundle, and either --ids or --check");
    }
    bool const wanted = options.wanted.computeCapability || options.wanted.tensorRt;
    if (wanted && !options.check)
    {
        wrong("--for-sm and --for-tensorrt belong to --check");
    }
    return options;
}

int fail(iq::Error const& error)
{
    std::fprintf(stderr, "iq_run: error: %s\n", error.text().c_str());
    return static_cast<int>(error.code);
}

void say(std::string const& what, std::string const& result)
{
    std::printf("  %-18s  %s\n", iq::printable(what).c_str(), iq::printable(result).c_str());
}

std::string describe(iq::EngineInfo const& engine)
{
    std::string text = engine.tensorRt.text() + ",";
    for (int32_t const sm : engine.computeCapabilities)
    {
        text += " sm_" + std::to_string(sm);
    }
    if (engine.form == iq::Form::kPlugin)
    {
        text += ", plugin version " + engine.pluginVersion
            + (engine.pluginEmbedded ? " in the plan" : " beside the plan");
    }
    return text;
}

// What is compared with the engines: what the options say, else what is found here.
iq::Result<iq::Probe> machineFor(Options const& options, iq::GraphInfo const& graph)
{
    iq::Probe probe;
    if (options.wanted.computeCapability || options.wanted.tensorRt)
    {
        probe.machine = options.wanted;
        probe.whyNoTensorRt = probe.whyNoDevice = "not asked for";
        return probe;
    }
    auto const named = graph.engines.find(options.engine.engine);
    auto const chosen = named == graph.engines.end() ? graph.engines.begin() : named;
    if (chosen == graph.engines.end())
    {
        return probe;
    }
    iq::TensorRt const& built = chosen->second.tensorRt;
    return iq::probeMachine(built.flavour, built.version[0], options.engine.library);
}

int check(Options const& options)
{
    iq::Target const target{options.engine.engine, options.wanted, options.engine.graph};
    bool const asked = !target.engine.empty() || target.machine.computeCapability
        || target.machine.tensorRt;
    auto const opened = iq::Bundle::open(options.bundle, asked ? &target : nullptr);
    if (!opened)
    {
        return fail(opened.error());
    }
    iq::Bundle const& bundle = opened.value();
    iq::Manifest const& manifest = bundle.manifest();
    iq::Result<iq::GraphInfo const*> const named = bundle.graph(target.graph);
    if (!named)
    {
        return fail(named.error());
    }
    iq::GraphInfo const& graph = *named.value();
    iq::Result<iq::Probe> const probed = machineFor(options, graph);
    if (!probed)
    {
        return fail(probed.error());
    }
    iq::Machine const& machine = probed.value().machine;
    bool const comparable = asked || machine.computeCapability || machine.tensorRt;
    iq::Result<iq::EngineInfo const*> const chosen = bundle.engine(graph, target.engine, machine);
    if (comparable && !chosen)
    {
        return fail(chosen.error());
    }
    uint64_t bytes = 0;
    for (auto const& [name, record] : manifest.files)
    {
        bytes += record.bytes;
    }
    std::string const title = options.bundle + ": " + manifest.name + ", " + manifest.recipe;
    std::printf("%s\n", iq::printable(title).c_str());
    say("manifest.json", "sha256 as in manifest.json.sha256");
    say("files", std::to_string(manifest.files.size()) + " files, " + std::to_string(bytes)
            + " bytes, size and sha256 as recorded");
    for (auto const& [name, engine] : graph.engines)
    {
        iq::Result<iq::CacheSize> const cache = bundle.cacheSize(graph, engine);
        if (!cache)
        {
            return fail(cache.error());
        }
        say("engine " + name, describe(engine));
        say("  KV cache", std::to_string(cache.value().tensors) + " tensors, "
                + std::to_string(cache.value().bytesPerToken) + " bytes a token, "
                + std::to_string(cache.value().maxTokens) + " tokens at most");
    }
    say("TensorRT", machine.tensorRt ? machine.tensorRt->text() + ": fits"
                                     : "not compared: " + probed.value().whyNoTensorRt);
    say("device", machine.computeCapability
            ? "sm_" + std::to_string(*machine.computeCapability) + ": fits"
            : "not compared: " + probed.value().whyNoDevice);
    return 0;
}

bool isIn(std::vector<int64_t> const& values, int64_t value)
{
    for (int64_t const other : values)
    {
        if (other == value)
        {
            return true;
        }
    }
    return false;
}

// Prints one line of ids for each prompt.
int run(Options const& options)
{
    iq::Result<iq::Bundle> opened = iq::Bundle::open(options.bundle);
    if (!opened)
    {
        return fail(opened.error());
    }
    auto const bundle = std::make_shared<iq::Bundle const>(std::move(opened).value());
    auto const eos = bundle->eosIds();
    if (!eos)
    {
        return fail(eos.error());
    }
    auto const engine = iq::Engine::load(bundle, options.engine);
    if (!engine)
    {
        return fail(engine.error());
    }
    size_t const rows = options.prompts.size();
    auto const session = iq::TextSession::create(engine.value(), static_cast<int32_t>(rows));
    if (!session)
    {
        return fail(session.error());
    }
    std::vector<std::vector<int64_t>> results(rows);
    std::vector<bool> ended(rows, false);
    size_t open = rows;
    iq::TextSession& text = *session.value();
    iq::Status status = text.prefill(options.prompts, options.sampling);
    for (int64_t step = 1; status; ++step)
    {
        for (size_t row = 0; row < rows; ++row)
        {
            int64_t const token = text.tokens()[row];
            if (!ended[row] && isIn(eos.value(), token))
            {
                ended[row] = true;
                --open;
            }
            if (!ended[row])
            {
                results[row].push_back(token);
            }
        }
        if (open == 0 || step == options.maxNew)
        {
            break;
        }
        status = text.decode();
    }
    if (!status)
    {
        return fail(status.error());
    }
    if (!text.graphNote().empty())
    {
        std::fprintf(stderr, "iq_run: %s\n", iq::printable(text.graphNote()).c_str());
    }
    for (auto const& result : results)
    {
        std::string line;
        for (int64_t const token : result)
        {
            line += (line.empty() ? "" : ",") + std::to_string(token);
        }
        std::printf("%s\n", line.c_str());
    }
    return 0;
}

} // namespace

int main(int argc, char** argv)
{
    if (argc == 2 && std::strcmp(argv[1], "--help") == 0)
    {
        std::fputs(kUsage, stdout);
        return 0;
    }
    try
    {
        Options const options = parse(argc, argv);
        return options.check ? check(options) : run(options);
    }
    catch (std::invalid_argument const& error)
    {
        std::fprintf(stderr, "iq_run: error: %s\n%s", iq::printable(error.what()).c_str(), kUsage);
        return static_cast<int>(iq::ErrorCode::kUsage);
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "iq_run: error: %s\n", iq::printable(error.what()).c_str());
        return static_cast<int>(iq::ErrorCode::kOther);
    }
}
