# cmake --install BUILD --prefix PREFIX; then find_package(mamba3) gives the target mamba3::mamba3.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/mamba3)
install(DIRECTORY include/mamba3 DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS mamba3 EXPORT mamba3_targets)
install(EXPORT mamba3_targets NAMESPACE mamba3:: DESTINATION ${package} FILE targets.cmake)
if(TARGET mamba3_program)
  install(TARGETS mamba3_program)
  install(TARGETS mamba3_program DESTINATION . COMPONENT dist EXCLUDE_FROM_ALL)  # scripts/dist
endif()
configure_package_config_file(cmake/mamba3-config.cmake.in mamba3-config.cmake
  INSTALL_DESTINATION ${package})
write_basic_package_version_file(mamba3-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/mamba3-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/mamba3-config-version.cmake
  cmake/dependencies.cmake
  DESTINATION ${package})
